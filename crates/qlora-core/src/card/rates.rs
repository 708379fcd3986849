//! Rates that plans are ranked with, and how a measurement at the start corrects them.

/// The throughput of a GPU in a training step, in operations and bytes a second.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub struct Rates {
    /// Operations in large 16-bit products.
    pub products: f64,
    /// Operations in attention, the masked half not counted.
    pub attention: f64,
    /// Bytes of its memory, read and written.
    pub memory: f64,
    /// Bytes to or from page-locked memory of the host.
    pub host: f64,
}

impl Default for Rates {
    /// An H100's.
    fn default() -> Self {
        Self::of(700e12, 2.6e12, 50e9)
    }
}

impl Rates {
    /// With attention at 4/7 of the products' rate, as on an H100.
    pub fn of(products: f64, memory: f64, host: f64) -> Self {
        Self { products, attention: products * 4.0 / 7.0, memory, host }
    }

    /// The same rates, corrected by a measurement.
    ///
    /// A measurement of a fraction of a second scatters by some percent, sees a card before it is warm, and must not choose another
    /// plan in every run. So a rate is replaced only where it is far off, and then by a step of a coarse ladder: the rate times a
    /// power of the square root of 2. From 0.6 to 1.68 times the rate nothing changes. Products are only ever found slower: a card
    /// reaches for a moment what its power limit forbids in a run.
    pub fn corrected(self, measured: MeasuredRates) -> Self {
        let products = self.products * ladder(measured.products / self.products).min(1.0);
        Self {
            products,
            attention: self.attention * (products / self.products),
            memory: self.memory * ladder(measured.memory / self.memory),
            host: self.host * ladder(measured.host / self.host),
        }
    }
}

/// The throughput measured at the start, in operations and bytes a second; 0 where nothing was measured.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct MeasuredRates {
    /// Operations in a large 16-bit product.
    pub products: f64,
    /// Bytes read and written by a large copy on the card.
    pub memory: f64,
    /// Bytes copied from page-locked memory of the host.
    pub host: f64,
}

/// The step of the ladder for a ratio of measured to expected: 1 unless that is far off.
fn ladder(ratio: f64) -> f64 {
    if !ratio.is_finite() || ratio <= 0.0 {
        return 1.0;
    }
    let steps = (2.0 * ratio.log2()).round().clamp(-12.0, 12.0);
    if steps.abs() <= 1.0 { 1.0 } else { (steps / 2.0).exp2() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_measurement_near_the_table_changes_nothing() {
        let rates = Rates::default();
        for ratio in [0.61, 0.8, 1.0, 1.3, 1.67] {
            let measured = MeasuredRates { products: ratio * 700e12, memory: ratio * 2.6e12, host: ratio * 50e9 };
            assert_eq!(rates.corrected(measured), rates, "{ratio}");
        }
        assert_eq!(rates.corrected(MeasuredRates::default()), rates, "nothing was measured");
        let broken = MeasuredRates { products: f64::NAN, memory: f64::INFINITY, host: -1.0 };
        assert_eq!(rates.corrected(broken), rates);
    }

    #[test]
    fn what_is_far_off_takes_a_step_that_scatter_does_not_change() {
        let host =
            |rate: f64| Rates::default().corrected(MeasuredRates { host: rate, ..MeasuredRates::default() }).host;
        // PCIe 3 with 16 lanes instead of PCIe 5, 10% up and down.
        assert_eq!([11.3e9, 12.5e9, 13.8e9].map(host), [12.5e9; 3]);
        assert_eq!(host(6.2e9), 6.25e9);
        assert_eq!(host(100e9), 100e9);
        let slow = Rates::default().corrected(MeasuredRates { products: 350e12, ..MeasuredRates::default() });
        assert_eq!((slow.products, slow.attention), (350e12, 200e12));
        let burst = Rates::default().corrected(MeasuredRates { products: 1400e12, ..MeasuredRates::default() });
        assert_eq!(burst, Rates::default());
    }
}
