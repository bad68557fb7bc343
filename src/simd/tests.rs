//! Every operation of every level against the scalar one of the standard library.
