"""Students and teachers: HuggingFace language models, built or loaded, whole or sharded."""
