"""Activation quantizers, their calibration, and the replicated state of every quantizer."""
