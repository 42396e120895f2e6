//! Large buffers.

/// So many zeros, in huge pages where the system has them: touching 128 MiB for the first time in small ones takes longer than
/// the exponentials of all logits in it.
pub(crate) fn zeros(len: usize) -> Vec<f32> {
    let zeros = vec![0.0; len];
    #[cfg(target_os = "linux")]
    advise_huge_pages(&zeros);
    zeros
}

#[cfg(target_os = "linux")]
fn advise_huge_pages(buffer: &[f32]) {
    use std::ffi::{c_int, c_void};
    const HUGE_PAGE: usize = 2 << 20;
    const MADV_HUGEPAGE: c_int = 14;
    unsafe extern "C" {
        fn madvise(address: *mut c_void, length: usize, advice: c_int) -> c_int;
    }
    let bytes = buffer.as_ptr_range();
    let (start, end) = ((bytes.start as usize).next_multiple_of(HUGE_PAGE), bytes.end as usize / HUGE_PAGE * HUGE_PAGE);
    if start < end {
        // SAFETY: the range lies within the buffer and begins on a page; this advice changes no contents, and it may be refused.
        unsafe { madvise(start as *mut c_void, end - start, MADV_HUGEPAGE) };
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn zeros_of_any_length() {
        for len in [0, 1, 1 << 19, (3 << 19) + 1, 5 << 20] {
            let mut zeros = super::zeros(len);
            assert_eq!(zeros.len(), len);
            assert!(zeros.iter().all(|&x| x == 0.0));
            zeros.fill(1.0);
        }
    }
}
