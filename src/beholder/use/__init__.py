"""A trained model at work: it looks and answers (`vlm`, `stream`), talks (`chat`), answers and scores files."""
