"""What a layer is made of: blocks that stand around mixers and feed-forwards, one file each."""
