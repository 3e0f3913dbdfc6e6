"""What is changed in a guest: operations with end conditions, applied, verified and recorded."""
