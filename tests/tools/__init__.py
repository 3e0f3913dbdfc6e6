"""What is rendered, judged and run by the init systems' own programs."""
