"""Where a model suffers from quantization: sensitivity by module, outliers, oscillation, and a mixed bit allocation."""
