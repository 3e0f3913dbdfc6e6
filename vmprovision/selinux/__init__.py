"""SELinux: the rules of a guest's policy, and the labels of an injection's files."""
