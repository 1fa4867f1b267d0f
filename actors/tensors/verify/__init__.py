"""The verification: what ranks compute, module by module, beside what plain Transformers computes."""
