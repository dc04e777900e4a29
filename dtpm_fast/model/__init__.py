"""The networks of the paper: block (figure 4), U-Net, semantic code, CG-Adapter (eq. 5), initial predictor."""
