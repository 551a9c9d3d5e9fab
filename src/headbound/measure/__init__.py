"""The measurements: one module an idea."""
