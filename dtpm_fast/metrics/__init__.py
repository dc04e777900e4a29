"""Image quality by the protocols that the paper's tables follow: PSNR, SSIM, MAE, LPIPS, patch FID."""
