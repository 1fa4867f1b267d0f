"""What a model is and how it is cut: its spec, its tensor-parallel plan, what each rank owns, and what that costs."""
