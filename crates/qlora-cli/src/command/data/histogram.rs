//! Lengths as bars of text.

use std::fmt::Write;

use crate::output::{FAINT, WARNING};

const BINS: usize = 12;
const WIDTH: usize = 40;

/// A line for each range of lengths, none without lengths. Ranges beyond `limit` are marked.
pub(super) fn text(lengths: &[usize], limit: usize) -> String {
    let Some(&longest) = lengths.iter().max() else { return String::new() };
    let width = round_up(longest.div_ceil(BINS).max(1));
    let mut counts = vec![0_usize; longest / width + 1];
    for length in lengths {
        counts[length / width] += 1;
    }
    let most = counts.iter().copied().max().unwrap_or(1).max(1);
    let digits = longest.to_string().len();
    let mut text = format!("{FAINT}tokens of a document, of {} documents{FAINT:#}\n", lengths.len());
    for (index, &count) in counts.iter().enumerate() {
        let (from, to) = (index * width, (index + 1) * width - 1);
        let bar = "█".repeat((count * WIDTH).div_ceil(most));
        // Writing to a string cannot fail.
        let _ = match from > limit {
            true => writeln!(text, "{from:>digits$} to {to:>digits$}  {WARNING}{bar}{WARNING:#} {count}"),
            false => writeln!(text, "{from:>digits$} to {to:>digits$}  {bar} {count}"),
        };
    }
    text
}

/// The next of 1, 2, 5, 10, 20, 50, ...
fn round_up(value: usize) -> usize {
    let mut power = 1;
    loop {
        if let Some(step) = [1, 2, 5].into_iter().map(|digit| digit * power).find(|&step| step >= value) {
            return step;
        }
        power *= 10;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_length_is_counted_once() {
        let lengths: Vec<usize> = (1..=997).collect();
        let text = text(&lengths, 500);
        let counts: Vec<usize> =
            text.lines().skip(1).map(|line| line.rsplit(' ').next().unwrap().parse().unwrap()).collect();
        assert_eq!(counts.iter().sum::<usize>(), 997);
        assert_eq!(counts.len(), 10);
        assert!(text.contains("100 to 199"), "{text}");
        assert_eq!(super::text(&[], 10), "");
    }

    #[test]
    fn ranges_are_round() {
        assert_eq!([1, 2, 3, 9, 11, 84, 512].map(round_up), [1, 2, 5, 10, 20, 100, 1000]);
    }
}
