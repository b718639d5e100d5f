"""What few queries give to each of many keys, whose softmax never is stored."""
