"""The command `inferpool evaluate`: how good a model's answers to rows with known answers are."""
