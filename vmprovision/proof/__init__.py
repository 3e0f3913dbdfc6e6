"""The proof: boot a throwaway copy of an image and ask its agent."""
