"""What an anomaly is read from: features, maps, noise errors, their weights, densities."""
