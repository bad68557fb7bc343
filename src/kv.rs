//! Keys and values as the kernel reads them: a [`Run`](run::Run) is rows at one stride, in one storage format.

pub(crate) mod run;
