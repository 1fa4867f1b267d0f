"""`stagemesh verify`: the layout that would be served, beside plain Transformers."""
