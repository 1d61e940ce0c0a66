"""Tasks: (model, data) -> Problem, a loss module, its metrics."""
