"""The command `inferpool import`: a trained model in, a version that answers as the framework does out."""
