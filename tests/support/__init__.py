"""What the tests share: references, the error bound, guarded memory."""
