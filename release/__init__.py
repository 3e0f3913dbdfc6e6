"""What a release is made with: man pages, shell completions, the pages of the site."""
