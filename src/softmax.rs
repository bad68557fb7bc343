//! Softmax on its own.
pub(crate) fn softmax_in_place(row: &mut [f32]) {
    // All of them, and not the maximum, which passes over a NaN.
    if row.iter().all(|x| *x == f32::NEG_INFINITY) {
        return row.fill(0.0);
    }
    let max = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    row.iter_mut().for_each(|x| *x = (*x - max).exp());
    let sum: f32 = row.iter().sum();
    row.iter_mut().for_each(|x| *x /= sum);
}
