"""A trained run inside other people's programs; each is imported by that program, and by nothing of ours."""
