//! The folder in which Hugging Face's libraries keep what they download and store.

use std::path::PathBuf;

/// `HF_HOME`, or `huggingface` in `XDG_CACHE_HOME`, or in `.cache` of the home folder; none if there is no home folder. `env` gives the
/// value of an environment variable, none if it is empty.
pub fn hf_home<T: Into<PathBuf>>(env: impl Fn(&str) -> Option<T>) -> Option<PathBuf> {
    let path = |name: &str| env(name).map(Into::into);
    let home = || path("HOME").or_else(|| path("USERPROFILE")).map(|home: PathBuf| home.join(".cache"));
    let cache = || path("XDG_CACHE_HOME").or_else(home).map(|cache: PathBuf| cache.join("huggingface"));
    path("HF_HOME").or_else(cache)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_nearest_variable_counts() {
        let of = |variables: &[(&str, &str)]| {
            hf_home(|name| variables.iter().find(|(known, _)| *known == name).map(|(_, value)| (*value).to_owned()))
        };
        let all = [("HF_HOME", "/hf"), ("XDG_CACHE_HOME", "/xdg"), ("HOME", "/home/u"), ("USERPROFILE", "C:/u")];
        let folders = ["/hf", "/xdg/huggingface", "/home/u/.cache/huggingface", "C:/u/.cache/huggingface"];
        for (first, folder) in folders.iter().enumerate() {
            assert_eq!(of(&all[first..]), Some(PathBuf::from(folder)));
        }
        assert_eq!(of(&[]), None);
    }
}
