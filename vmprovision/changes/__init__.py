"""Changes of a guest: operations with end conditions, applied, verified and recorded."""
