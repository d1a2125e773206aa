"""Read and write weights: files, manifests, and foreign formats; independent of training."""
