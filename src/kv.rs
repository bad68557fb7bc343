//! Keys and values as the kernel reads them: a [`Run`](run::Run) of rows at one stride, in one storage format.

pub(crate) mod run;
