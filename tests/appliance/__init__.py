"""The saved appliance: made, restored, distrusted, replaced; pools; the right disk."""
