"""Language models judged: perplexity and zero-shot tasks, of torch models and of files in their own runtime."""
