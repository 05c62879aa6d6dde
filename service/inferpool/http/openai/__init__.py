"""The routes for texts that RAG clients call: OpenAI's embeddings, Cohere's and Jina's rerank, and scores."""
