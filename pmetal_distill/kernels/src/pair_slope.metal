                float d = x - x_top, other = capped<CAPPED>(y, cap) - y_top;
                float e = exp2_fast(d * rate);
                float g = soft * e;
                if (FORM == 1) g += gap * (d - other) * e;
                if (FORM <= 1) g += weight * exp2_fast(other * rate);
                if (FORM >= 2) {
                    float lp = other * rate + y_offset, lq = d * rate + x_offset;
                    g += term * (FORM == 2 ? mixture_term(lp, lq, wp, wq, share) : variation_term(lp, lq)).slope;
                }
                g += hard * (power == 2 ? e * e : power == 1 ? e : exp2_fast(d * LOG2E));
                if (idle) g = 0.0f;
