"""SELinux labels, compared with what libselinux itself says."""
