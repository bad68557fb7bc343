//! Softmax on its own.
