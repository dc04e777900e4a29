"""Figure 4: the denoising block, and NAFNet's own block on the same body."""

import torch
from torch import nn

from dtpm_fast.model.block import DenoisingBlock, NAFBlock, adaln, simple_gate, use_kernels


def test_fresh_block_is_the_identity():
    x = torch.randn(2, 6, 5, 7)
    assert torch.equal(DenoisingBlock(6, 4)(x, torch.randn(2, 4)), x)


def test_block_against_figure_4_written_out(randomized):
    block, x, e = (
        randomized(DenoisingBlock(6, 4)).double(),
        torch.randn(3, 6, 5, 7).double(),
        torch.randn(3, 4).double(),
    )
    shift1, scale1, shift2, scale2 = (
        p[:, :, None, None] for p in (e @ block.modulation.weight.T + block.modulation.bias).chunk(4, 1)
    )

    def layer_norm(x):
        mean = x.mean(1, keepdim=True)
        return (x - mean) / ((x - mean).square().mean(1, keepdim=True) + 1e-6).sqrt()

    h = block.conv2(block.conv1(layer_norm(x) * (1 + scale1) + shift1))
    h = h[:, :6] * h[:, 6:]
    attention = torch.einsum("oc,bc->bo", block.sca[1].weight[:, :, 0, 0], h.mean((2, 3))) + block.sca[1].bias
    y = x + block.beta * block.conv3(h * attention[:, :, None, None])
    h = block.conv4(layer_norm(y) * (1 + scale2) + shift2)
    expected = y + block.gamma * block.conv5(h[:, :6] * h[:, 6:])
    torch.testing.assert_close(block(x, e), expected, rtol=1e-11, atol=1e-11)


def test_naf_block_has_an_affine_layer_norm(randomized):
    block, x = randomized(NAFBlock(6)).double(), torch.randn(2, 6, 4, 5).double()
    normal = nn.functional.layer_norm(x.permute(0, 2, 3, 1), (6,), block.norm1.weight, block.norm1.bias, 1e-6)
    mine = adaln(x, block.norm1.bias.expand(2, -1), (block.norm1.weight - 1).expand(2, -1))
    torch.testing.assert_close(mine, normal.permute(0, 3, 1, 2), rtol=1e-11, atol=1e-11)


def test_gradcheck(randomized):
    block = randomized(DenoisingBlock(4, 3)).double()
    x, e = (
        torch.randn(2, 4, 3, 4, dtype=torch.float64, requires_grad=True),
        torch.randn(2, 3, dtype=torch.float64, requires_grad=True),
    )
    assert torch.autograd.gradcheck(lambda x, e, *_: block(x, e), (x, e, *block.parameters()))


def test_layer_norm_survives_an_offset_in_bfloat16():
    """Statistics stay in float32: an offset of 100 does not turn the variance into noise."""
    x = (torch.randn(1, 32, 8, 8) + 100).bfloat16()
    exact = adaln(x.double(), torch.zeros(1, 32), torch.zeros(1, 32))
    assert (adaln(x, torch.zeros(1, 32).bfloat16(), torch.zeros(1, 32).bfloat16()).double() - exact).abs().max() < 0.02


def test_simple_gate_halves_the_channels():
    a, b = torch.randn(2, 3, 4, 5), torch.randn(2, 3, 4, 5)
    assert torch.equal(simple_gate(torch.cat([a, b], 1)), a * b)


def test_the_kernels_give_the_same_from_the_same_parameters(randomized):
    """One switch: outputs and every gradient agree, and the state dict is the same one."""
    block, x, e = (
        randomized(DenoisingBlock(8, 4)).double(),
        torch.randn(2, 8, 5, 7).double(),
        torch.randn(2, 4).double(),
    )
    names, found = list(block.state_dict()), []
    for on in (False, True):
        use_kernels(block, on)
        block.zero_grad()
        out = block(x, e)
        out.square().sum().backward()
        found.append([out.detach(), *(p.grad.clone() for p in block.parameters())])
    assert list(block.state_dict()) == names
    for reference, fused in zip(*found, strict=True):
        torch.testing.assert_close(fused, reference, rtol=1e-9, atol=1e-9)
