"""Every private import from torch, and every branch on its version."""
