"""Programs beside the recipe: ask a model, plan memory and time, lock the dependencies."""
