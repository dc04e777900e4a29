"""The networks of the paper: denoising block (figure 4), U-Net, semantic code, CG-Adapter (eq. 5), initial predictor."""
