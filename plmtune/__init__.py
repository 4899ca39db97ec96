"""plmtune: small language models for edge devices, from raw text to a file that a device runs."""
