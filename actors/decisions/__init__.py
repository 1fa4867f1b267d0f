"""Sub-floor b: decisions on plain data, without torch and without Ray."""
