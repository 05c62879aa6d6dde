"""The routes that cloud platforms call: SageMaker, Vertex AI and Azure ML."""
