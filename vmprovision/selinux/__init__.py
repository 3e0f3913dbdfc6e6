"""SELinux: the rules of a guest's policy, and the labels that they give to what is installed."""
