"""From a trained model to a version: the build scripts of the models folder."""
