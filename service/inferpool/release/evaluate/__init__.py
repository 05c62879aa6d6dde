"""How good a model's answers are: metrics with their intervals, and the report that shows them."""
