"""The library behind the notebooks: diffusion-based zero-shot anomaly detection."""
