"""Extract and interpret biological concepts from scRNA-seq foundation models (Claye et al. 2025)."""
