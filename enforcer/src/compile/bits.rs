//! A set of small numbers (rules, service classes), one bit each.

/// A bit set of fixed length.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Bits(Vec<u32>);

impl Bits {
    pub(super) fn empty(length: usize) -> Self {
        Self(vec![0; length.div_ceil(32)])
    }

    pub(super) fn full(length: usize) -> Self {
        let mut bits = Self(vec![u32::MAX; length.div_ceil(32)]);
        if let Some(last) = bits.0.last_mut()
            && !length.is_multiple_of(32)
        {
            *last = (1 << (length % 32)) - 1;
        }
        bits
    }

    /// Numbers past the length are not in the set and stay out of it.
    pub(super) fn insert(&mut self, number: usize) {
        if let Some(word) = self.0.get_mut(number / 32) {
            *word |= 1 << (number % 32);
        }
    }

    pub(super) fn remove(&mut self, number: usize) {
        if let Some(word) = self.0.get_mut(number / 32) {
            *word &= !(1 << (number % 32));
        }
    }

    pub(super) fn contains(&self, number: usize) -> bool {
        self.0
            .get(number / 32)
            .is_some_and(|word| word >> (number % 32) & 1 != 0)
    }

    /// Makes it equal to `other`, which has the same length.
    pub(super) fn copy(&mut self, other: &Self) {
        self.0.copy_from_slice(&other.0);
    }

    /// Removes the numbers of `other` and tells each that was in the set.
    pub(super) fn take(&mut self, other: &Self, mut act: impl FnMut(usize)) {
        for (at, (word, other)) in self.0.iter_mut().zip(&other.0).enumerate() {
            let taken = *word & other;
            if taken != 0 {
                *word &= !other;
                ones(taken, at, &mut act);
            }
        }
    }

    pub(super) fn words(&self) -> &[u32] {
        &self.0
    }
}

/// Tells the numbers in both sets, given as words, ascending.
pub(super) fn common(a: &[u32], b: &[u32], mut act: impl FnMut(usize)) {
    for (at, (a, b)) in a.iter().zip(b).enumerate() {
        if a & b != 0 {
            ones(a & b, at, &mut act);
        }
    }
}

/// Tells the numbers in `a` that are not in `b`, given as words, ascending.
pub(super) fn missing(a: &[u32], b: &[u32], mut act: impl FnMut(usize)) {
    for (at, (a, b)) in a.iter().zip(b).enumerate() {
        ones(a & !b, at, &mut act);
    }
}

/// Tells the numbers in the set, given as words, ascending.
pub(super) fn each(set: &[u32], mut act: impl FnMut(usize)) {
    for (at, word) in set.iter().enumerate() {
        ones(*word, at, &mut act);
    }
}

/// Tells the numbers in the word at index `at`, ascending.
fn ones(mut word: u32, at: usize, act: &mut impl FnMut(usize)) {
    while word != 0 {
        act(at * 32 + word.trailing_zeros() as usize);
        word &= word - 1;
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    fn bits(numbers: &BTreeSet<usize>) -> Bits {
        let mut bits = Bits::empty(200);
        for number in numbers {
            bits.insert(*number);
        }
        bits
    }

    proptest! {
        #[test]
        fn behaves_as_a_set(
            a in prop::collection::btree_set(0usize..200, 0..60),
            b in prop::collection::btree_set(0usize..200, 0..60),
        ) {
            let (x, y) = (bits(&a), bits(&b));
            let mut both = Vec::new();
            common(x.words(), y.words(), |n| both.push(n));
            let expected: Vec<usize> = a.intersection(&b).copied().collect();
            prop_assert_eq!(&both, &expected);
            let mut others = Vec::new();
            missing(x.words(), y.words(), |n| others.push(n));
            prop_assert_eq!(others, a.difference(&b).copied().collect::<Vec<_>>());
            let mut all = Vec::new();
            each(x.words(), |n| all.push(n));
            prop_assert_eq!(all, a.iter().copied().collect::<Vec<_>>());
            let mut rest = Bits::empty(200);
            rest.copy(&x);
            let mut taken = Vec::new();
            rest.take(&y, |n| taken.push(n));
            prop_assert_eq!(taken, expected);
            prop_assert_eq!(rest, bits(&(&a - &b)));
            for number in 0..210 {
                prop_assert_eq!(x.contains(number), a.contains(&number));
            }
            let mut none = x;
            for number in &a {
                none.remove(*number);
            }
            prop_assert_eq!(none, Bits::empty(200));
        }
    }

    #[test]
    fn full_has_exactly_its_length() {
        for length in [0, 1, 31, 32, 33, 128, 200] {
            let mut count = 0;
            Bits::full(length).take(&Bits::full(length), |_| count += 1);
            assert_eq!(count, length);
            assert!(!Bits::full(length).contains(length));
        }
    }
}
