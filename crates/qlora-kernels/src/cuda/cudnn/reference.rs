//! Causal attention, forward and backward, in f64 on the host: short, slow, and obviously right.

/// Sizes of one sequence.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Sizes {
    pub(crate) seq: usize,
    pub(crate) heads: usize,
    pub(crate) kv_heads: usize,
    pub(crate) head_dim: usize,
}

/// Results of [`attention`], token by token: `[seq, heads, head_dim]`, `lse` is `[seq, heads]`.
#[derive(Clone, Debug)]
pub(crate) struct Attention {
    pub(crate) o: Vec<f64>,
    pub(crate) lse: Vec<f64>,
    pub(crate) dq: Vec<f64>,
    pub(crate) dk: Vec<f64>,
    pub(crate) dv: Vec<f64>,
}

/// Attention of one sequence. `q` and `d_o` are `[seq, heads, head_dim]`, `k` and `v` `[seq, kv_heads, head_dim]`.
pub(crate) fn attention(sizes: Sizes, q: &[f64], k: &[f64], v: &[f64], d_o: &[f64], scale: f64) -> Attention {
    let Sizes { seq, heads, kv_heads, head_dim: d } = sizes;
    let mut result = Attention {
        o: vec![0.0; seq * heads * d],
        lse: vec![0.0; seq * heads],
        dq: vec![0.0; seq * heads * d],
        dk: vec![0.0; seq * kv_heads * d],
        dv: vec![0.0; seq * kv_heads * d],
    };
    let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
    let add = |target: &mut [f64], factor: f64, source: &[f64]| {
        target.iter_mut().zip(source).for_each(|(target, source)| *target += factor * source);
    };
    let mut weights = vec![0.0; seq];
    for head in 0..heads {
        let kv_head = head / (heads / kv_heads);
        for row in 0..seq {
            let wide = |token: usize| (token * heads + head) * d..(token * heads + head + 1) * d;
            let narrow = |token: usize| (token * kv_heads + kv_head) * d..(token * kv_heads + kv_head + 1) * d;
            let (q_row, d_o_row) = (&q[wide(row)], &d_o[wide(row)]);

            for (column, weight) in weights[..=row].iter_mut().enumerate() {
                *weight = scale * dot(q_row, &k[narrow(column)]);
            }
            let maximum = weights[..=row].iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let lse = maximum + weights[..=row].iter().map(|score| (score - maximum).exp()).sum::<f64>().ln();
            weights[..=row].iter_mut().for_each(|score| *score = (*score - lse).exp());
            result.lse[row * heads + head] = lse;
            for (column, weight) in weights[..=row].iter().enumerate() {
                add(&mut result.o[wide(row)], *weight, &v[narrow(column)]);
            }

            let row_sum = dot(d_o_row, &result.o[wide(row)]);
            for (column, weight) in weights[..=row].iter().enumerate() {
                let ds = weight * (dot(d_o_row, &v[narrow(column)]) - row_sum) * scale;
                add(&mut result.dv[narrow(column)], *weight, d_o_row);
                add(&mut result.dk[narrow(column)], ds, q_row);
                add(&mut result.dq[wide(row)], ds, &k[narrow(column)]);
            }
        }
    }
    result
}

/// `||a - b|| / ||b||`; infinite when anything is not finite.
pub(crate) fn relative_error(a: &[f64], b: &[f64]) -> f64 {
    let norm = |values: &mut dyn Iterator<Item = f64>| values.map(|value| value * value).sum::<f64>().sqrt();
    let error = norm(&mut a.iter().zip(b).map(|(a, b)| a - b)) / norm(&mut b.iter().copied()).max(f64::MIN_POSITIVE);
    if error.is_finite() { error } else { f64::INFINITY }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The gradients are those of `sum(o * d_o)`, by central differences.
    #[test]
    fn gradients_are_those_of_the_output() {
        let sizes = Sizes { seq: 5, heads: 4, kv_heads: 2, head_dim: 3 };
        let values = |count: usize, start: f64| (0..count).map(|i| (start + 1.7 * i as f64).sin()).collect::<Vec<_>>();
        let (q, d_o) = (values(60, 0.1), values(60, 0.2));
        let (k, v) = (values(30, 0.3), values(30, 0.4));
        let exact = attention(sizes, &q, &k, &v, &d_o, 0.7);
        let value = |q: &[f64], k: &[f64], v: &[f64]| -> f64 {
            attention(sizes, q, k, v, &d_o, 0.7).o.iter().zip(&d_o).map(|(o, d_o)| o * d_o).sum()
        };
        let shifted = |values: &[f64], index: usize, by: f64| {
            let mut values = values.to_vec();
            values[index] += by;
            values
        };
        let step = 1e-5;
        for index in 0..60 {
            let [up, down] = [step, -step].map(|by| value(&shifted(&q, index, by), &k, &v));
            assert!(((up - down) / (2.0 * step) - exact.dq[index]).abs() < 1e-8);
        }
        for index in 0..30 {
            let [up, down] = [step, -step].map(|by| value(&q, &shifted(&k, index, by), &v));
            assert!(((up - down) / (2.0 * step) - exact.dk[index]).abs() < 1e-8);
            let [up, down] = [step, -step].map(|by| value(&q, &k, &shifted(&v, index, by)));
            assert!(((up - down) / (2.0 * step) - exact.dv[index]).abs() < 1e-8);
        }
    }
}
