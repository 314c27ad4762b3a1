//! The latency scale: logarithmic buckets with sixteen steps per power of two, so that a value is known to 1/16.
//!
//! Kernel and user space count into the same buckets, so a guest's latency reads the same from every heat source.

/// Nanoseconds per unit of the scale, as a shift: below 64 ns nothing is told apart.
pub const UNIT_SHIFT: u32 = 6;

/// Steps per power of two, as a shift.
pub const STEP_SHIFT: u32 = 4;

/// Highest power of two of a unit that has its own buckets: 2^31 units are 137 s, longer waits count as that.
const EXPONENT_MAX: u32 = 30;

/// Number of buckets.
pub const BUCKETS: usize = ((EXPONENT_MAX - STEP_SHIFT + 2) << STEP_SHIFT) as usize;

/// The bucket of a duration; always below [`BUCKETS`].
#[inline(always)]
pub fn bucket_of_ns(ns: u64) -> u32 {
    let units = ns >> UNIT_SHIFT;
    if units < 1 << STEP_SHIFT {
        return units as u32;
    }
    let exponent = 63 - units.leading_zeros();
    if exponent > EXPONENT_MAX {
        return BUCKETS as u32 - 1;
    }
    let step = (units >> (exponent - STEP_SHIFT)) as u32 & ((1 << STEP_SHIFT) - 1);
    ((exponent - STEP_SHIFT + 1) << STEP_SHIFT) | step
}

/// The duration in the middle of a bucket, nanoseconds.
pub fn bucket_middle_ns(bucket: u32) -> u64 {
    let bucket = u64::from(bucket);
    let row = bucket >> STEP_SHIFT;
    let step = bucket & ((1 << STEP_SHIFT) - 1);
    let (first, width_shift) = match row {
        0 => (step, 0),
        _ => (((1 << STEP_SHIFT) | step) << (row - 1), row - 1),
    };
    (first << UNIT_SHIFT) + ((1 << (UNIT_SHIFT as u64 + width_shift)) >> 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_middle_of_a_bucket_lies_in_it() {
        for bucket in 0..BUCKETS as u32 {
            assert_eq!(bucket_of_ns(bucket_middle_ns(bucket)), bucket);
        }
    }

    #[test]
    fn buckets_ascend_and_never_overflow() {
        let mut last = 0;
        for shift in 0..64 {
            for ns in [(1u64 << shift) - 1, 1 << shift, (1 << shift) + (1 << shift) / 3] {
                let bucket = bucket_of_ns(ns);
                assert!(bucket >= last && (bucket as usize) < BUCKETS, "{ns} ns -> {bucket}");
                last = bucket;
            }
        }
        assert_eq!(bucket_of_ns(u64::MAX), BUCKETS as u32 - 1);
    }

    #[test]
    fn a_bucket_is_within_a_sixteenth_of_what_it_counts() {
        for ns in (1_000..200_000_000_000u64)
            .step_by(7_654_321)
            .filter(|ns| *ns < 137_000_000_000)
        {
            let middle = bucket_middle_ns(bucket_of_ns(ns));
            assert!(middle.abs_diff(ns) <= ns / 16 + 64, "{ns} ns -> {middle} ns");
        }
    }
}
