//! A small map that forgets the least recently used entry.

/// At most `capacity` entries. Looking one up goes through all of them: made for tens.
#[derive(Debug)]
pub(crate) struct Lru<K, V> {
    /// The one used last is at the end.
    entries: Vec<(K, V)>,
    capacity: usize,
}

impl<K: PartialEq, V> Lru<K, V> {
    /// Empty. A capacity of 0 counts as 1.
    pub(crate) fn new(capacity: usize) -> Self {
        Self { entries: Vec::new(), capacity: capacity.max(1) }
    }

    /// The value of `key`, which then was used last.
    pub(crate) fn get(&mut self, key: &K) -> Option<&V> {
        let index = self.entries.iter().position(|(known, _)| known == key)?;
        let entry = self.entries.remove(index);
        self.entries.push(entry);
        self.entries.last().map(|(_, value)| value)
    }

    /// Adds a new entry; returns the one that had to go for it.
    pub(crate) fn insert(&mut self, key: K, value: V) -> Option<V> {
        let forgotten = (self.entries.len() >= self.capacity).then(|| self.entries.remove(0).1);
        self.entries.push((key, value));
        forgotten
    }

    /// All entries, the one used last at the end.
    pub(crate) fn iter(&self) -> impl Iterator<Item = &(K, V)> {
        self.entries.iter()
    }

    /// Forgets everything.
    pub(crate) fn clear(&mut self) {
        self.entries.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_not_used_for_longest_goes() {
        let mut lru = Lru::new(2);
        assert_eq!(lru.insert("a", 1), None);
        assert_eq!(lru.insert("b", 2), None);
        assert_eq!(lru.get(&"a"), Some(&1));
        assert_eq!(lru.insert("c", 3), Some(2));
        assert_eq!(["b", "c", "a"].map(|key| lru.get(&key).copied()), [None, Some(3), Some(1)]);
        assert_eq!(lru.iter().map(|(key, _)| *key).collect::<String>(), "ca");
        lru.clear();
        assert_eq!(lru.get(&"a"), None);
    }
}
