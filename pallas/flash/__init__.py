"""Attention kernels: forward and backward over lists of key blocks."""
